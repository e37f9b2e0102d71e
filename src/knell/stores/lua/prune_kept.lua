-- Removes dedupe records and parked entries past their time. ARGV: now, retention of parked entries (s), at most.
local now = clock(ARGV[1])
local records = redis.call('ZRANGEBYSCORE', tag .. ':kx', '-inf', text(now), 'LIMIT', 0, ARGV[3])
for _, name in ipairs(records) do
  redis.call('DEL', tag .. ':k:' .. name)
  redis.call('ZREM', tag .. ':kx', name)
end
local before = text(now - tonumber(ARGV[2]))
local removed = 0
for _, id in ipairs(redis.call('ZRANGEBYSCORE', tag .. ':pa', '-inf', before, 'LIMIT', 0, ARGV[3])) do
  removed = removed + remove_parked(id)
end
return {#records, removed}
