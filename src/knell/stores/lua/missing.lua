-- What a service was not told: an open record of its own says since when.    :ms  service -> its missed record
local function mark_missed(service, since, batch, now)
  if redis.call('HEXISTS', tag .. ':s', service) == 0 then
    return
  end
  local open = redis.call('HGET', tag .. ':ms', service)
  local before = open and redis.call('HMGET', record_key(open), 'z', 'a')
  if before and tonumber(before[1]) < tonumber(since) then
    since = before[1]
  end
  if before and before[2] == '0' then
    redis.call('HSET', record_key(open), 'z', since)
    return
  end
  local attempts, resend_at = 0, 0
  if before then
    -- It was sent, and a receipt for that copy knows nothing of what was dropped since: another takes its place and turn.
    attempts, resend_at = before[2], redis.call('ZSCORE', tag .. ':o', open)
    remove_record(open)
  end
  record(batch, 'm', now, '', '\1', {service}, resend_at)
  redis.call('HSET', record_key(batch), 'z', since, 'a', attempts)
  redis.call('HSET', tag .. ':ms', service, batch)
end
