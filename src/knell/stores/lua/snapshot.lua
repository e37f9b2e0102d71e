-- A page of the denylist. ARGV: the position before it, its length. Answers position and revocation, and so on.
local answer = {}
local ids = redis.call('ZRANGEBYSCORE', tag .. ':p', '(' .. ARGV[1], '+inf', 'LIMIT', 0, ARGV[2])
for _, id in ipairs(ids) do
  local position, _, revocation = unpack_revocation(redis.call('HGET', tag .. ':v', id))
  answer[#answer + 1] = position
  answer[#answer + 1] = revocation
end
return answer
