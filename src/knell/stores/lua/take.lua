-- Hands out records whose time has come. ARGV: now, first re-send, longest re-send (s), batch ids. Answers {id, record}.
local now, first, longest = clock(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local answer = {}
for i = 4, #ARGV do
  local batch = ARGV[i]
  local due = redis.call('ZSCORE', tag .. ':o', batch)
  if due and tonumber(due) <= now then
    local attempts = redis.call('HINCRBY', record_key(batch), 'a', 1)
    local delay = math.min(first * 2 ^ math.min(attempts - 1, 60), longest)
    redis.call('ZADD', tag .. ':o', text(now + delay), batch)
    answer[#answer + 1] = {batch, redis.call('HGETALL', record_key(batch))}
  end
end
return answer
