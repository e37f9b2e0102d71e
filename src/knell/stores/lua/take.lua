-- Hands out records whose time has come. ARGV: now, first re-send, longest re-send (s), the call's mark, batch ids.
-- Answers {id, record}; for the same call again, whose first answer was lost, those that it was given then.
local now, first, longest = clock(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local answer = {}
for i = 5, #ARGV do
  local batch = ARGV[i]
  local key = record_key(batch)
  local due = redis.call('ZSCORE', tag .. ':o', batch)
  local taken = due and redis.call('HGET', key, 't') == ARGV[4]
  if due and not taken and tonumber(due) <= now then
    local attempts = redis.call('HINCRBY', key, 'a', 1)
    local delay = math.min(first * 2 ^ math.min(attempts - 1, 60), longest)
    redis.call('ZADD', tag .. ':o', text(now + delay), batch)
    redis.call('HSET', key, 't', ARGV[4])
    taken = true
  end
  if taken then
    answer[#answer + 1] = {batch, redis.call('HGETALL', key)}
  end
end
return answer
