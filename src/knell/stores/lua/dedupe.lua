-- A service's records of batches: :k:<service>:<batch> with h holder, u end of its lease, d and p bitmaps of what is done
-- and parked; :kx:<service> the batches by when their records leave; :ks the services that have any.
local function keep(service, batch, now, lifetime)
  redis.call('SADD', tag .. ':ks', service)
  redis.call('ZADD', tag .. ':kx:' .. service, text(now + lifetime), batch)
end

local function record_of(service, batch)
  return tag .. ':k:' .. service .. ':' .. batch
end

-- Removes records past their time. Answers how many.
local function remove_old(service, now, most)
  local key = tag .. ':kx:' .. service
  local batches = redis.call('ZRANGEBYSCORE', key, '-inf', text(now), 'LIMIT', 0, most)
  for _, batch in ipairs(batches) do
    redis.call('DEL', record_of(service, batch))
    redis.call('ZREM', key, batch)
  end
  return #batches
end
