-- Removes dedupe records, parked and audit entries past their time. ARGV: now, retention of parked entries (s), at most,
-- retention of audit entries (s).
local now = clock(ARGV[1])
local most, records = tonumber(ARGV[3]), 0
for _, service in ipairs(redis.call('SMEMBERS', tag .. ':ks')) do
  records = records + remove_old(service, now, most - records)
  if redis.call('EXISTS', tag .. ':kx:' .. service) == 0 then
    redis.call('SREM', tag .. ':ks', service)
  end
end
local before = text(now - tonumber(ARGV[2]))
local removed = 0
for _, id in ipairs(redis.call('ZRANGEBYSCORE', tag .. ':pa', '-inf', before, 'LIMIT', 0, ARGV[3])) do
  removed = removed + remove_parked(id)
end
local notes = redis.call('ZRANGEBYSCORE', tag .. ':ai', '-inf', text(now - tonumber(ARGV[4])), 'LIMIT', 0, ARGV[3])
for _, id in ipairs(notes) do
  redis.call('HDEL', tag .. ':ae', id)
  redis.call('ZREM', tag .. ':ai', id)
end
return {records, removed, #notes}
