-- Notices for services were dropped. ARGV: now, then for each: service, since when, a batch id for a new record.
local now = clock(ARGV[1])
for i = 2, #ARGV, 3 do
  local service, since, batch = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  local open = redis.call('HGET', tag .. ':ms', service)
  local before = open and redis.call('HMGET', record_key(open), 'z', 'a')
  if before and tonumber(before[1]) < tonumber(since) then
    since = before[1]
  end
  if before and before[2] == '0' then
    redis.call('HSET', record_key(open), 'z', since)
  elseif redis.call('SISMEMBER', tag .. ':gone', service) == 0 then
    if open then
      -- It was sent: a receipt for that copy knows nothing of what was dropped since.
      remove_record(open)
    end
    record(batch, 'm', now, '', '\1', {service}, 0)
    redis.call('HSET', record_key(batch), 'z', since)
    redis.call('HSET', tag .. ':ms', service, batch)
  end
end
return 1
