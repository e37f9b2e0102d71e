-- A page of parked entries. ARGV: ":<service>" or "" for all, the lower end of the range, how many. Answers {JSON, JWS}.
local answer = {}
for _, id in ipairs(redis.call('ZRANGEBYLEX', tag .. ':pk' .. ARGV[1], ARGV[2], '+', 'LIMIT', 0, ARGV[3])) do
  local digest, _, body = unpack_parked(redis.call('HGET', tag .. ':pd', id))
  answer[#answer + 1] = {body, digest ~= '' and redis.call('HGET', tag .. ':pj', digest) or ''}
end
return answer
