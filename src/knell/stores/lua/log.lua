-- The notice log of one slot.
--   :n:<batch id>  a record: k kind, c created, a attempts, t who took it last, b body, l bitmap of its entries,
--                  st settled, z since, y bytes, p position (revocations); w:<service> what the service has closed and
--                  until when it is held; s:<service> its state (revocations)
--   :o  open records by when they are sent again    :c  records by when they were made    :b  bytes of the open records
local RECORD_OVERHEAD = 256

local function record_key(batch)
  return tag .. ':n:' .. batch
end

local function pack_part(closed, hold)
  return struct.pack('>d', hold) .. closed
end

local function record(batch, kind, now, body, live, services, resend_at)
  local key = record_key(batch)
  local size = #body + RECORD_OVERHEAD
  redis.call('HSET', key, 'k', kind, 'c', text(now), 'a', 0, 'b', body, 'l', live, 'y', size)
  for _, service in ipairs(services) do
    redis.call('HSET', key, 'w:' .. service, pack_part('', 0))
    if kind == 'r' then
      redis.call('HSET', key, 's:' .. service, 'waiting')
    end
  end
  if kind ~= 'm' then
    redis.call('ZADD', tag .. ':c', text(now), batch)
  end
  if #services > 0 then
    redis.call('ZADD', tag .. ':o', text(resend_at), batch)
    redis.call('INCRBY', tag .. ':b', size)
  end
end

local function close_record(batch)
  if redis.call('ZREM', tag .. ':o', batch) == 1 then
    redis.call('DECRBY', tag .. ':b', redis.call('HGET', record_key(batch), 'y') or 0)
  end
end

local function remove_record(batch)
  close_record(batch)
  redis.call('ZREM', tag .. ':c', batch)
  return redis.call('DEL', record_key(batch))
end

-- The services that a record waits for.
local function waiting(key)
  local found = {}
  for _, name in ipairs(redis.call('HKEYS', key)) do
    if string.sub(name, 1, 2) == 'w:' then
      found[#found + 1] = string.sub(name, 3)
    end
  end
  return found
end

-- Ends a record that no service waits for; a revocation's is kept, so that its status can be told.
local function close_if_done(batch, kind)
  if #waiting(record_key(batch)) > 0 then
    return
  end
  if kind == 'r' then
    close_record(batch)
  else
    remove_record(batch)
  end
end

local function close_part(batch, kind, service)
  redis.call('HDEL', record_key(batch), 'w:' .. service)
  if kind == 'm' then
    redis.call('HDEL', tag .. ':ms', service)
  end
  close_if_done(batch, kind)
end
