-- Records to be dropped: past the retention, and the oldest of an expiry while the log is too large. ARGV: now, retention
-- (s), bytes to give back, how many at most. Answers {id, when made, the services that wait for it}.
local before = clock(ARGV[1]) - tonumber(ARGV[2])
local bytes, most = tonumber(ARGV[3]), tonumber(ARGV[4])
local answer = {}
for _, batch in ipairs(redis.call('ZRANGE', tag .. ':c', 0, most - 1)) do
  local key = record_key(batch)
  local found = redis.call('HMGET', key, 'k', 'c', 'y')
  local old = not found[1] or tonumber(found[2]) <= before
  if old or (bytes > 0 and found[1] == 'e') then
    local waits = found[1] and waiting(key) or {}
    if #waits > 0 then
      bytes = bytes - tonumber(found[3])
    end
    answer[#answer + 1] = {batch, found[2] or '0', unpack(waits)}
  elseif bytes <= 0 then
    break
  end
end
return answer
