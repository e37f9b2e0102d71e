-- The revocations under each deny key. ARGV: now, the keys. Answers now, then {number of the key, the revocations} for
-- each key that has some.
local answer = {text(clock(ARGV[1]))}
for from = 2, #ARGV, 1000 do
  local found = redis.call('HMGET', tag .. ':y', unpack(ARGV, from, math.min(from + 999, #ARGV)))
  for i, packed in ipairs(found) do
    if packed then
      local hit = {from + i - 3}
      for _, id in ipairs(ids_under(ARGV[from + i - 1])) do
        local _, _, revocation = unpack_revocation(redis.call('HGET', tag .. ':v', id))
        hit[#hit + 1] = revocation
      end
      answer[#answer + 1] = hit
    end
  end
end
return answer
