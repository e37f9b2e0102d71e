-- The denylist and its change feed.
--   :m  epoch, pos (the last position)    :f  the feed, a stream with ids "<position>-0"
--   :v  revocation id -> position, its deny key, the revocation    :y  deny key -> ids    :p  ids by position
--   :x  ids by when they leave            :s  service -> when it was added              :ms  service -> its missed record
local function pack_revocation(position, deny_key, revocation)
  return struct.pack('>I8', position) .. pack_item(deny_key) .. revocation
end

local function unpack_revocation(packed)
  local position, deny_key, at = struct.unpack('>I8I2c0', packed)
  return position, deny_key, string.sub(packed, at)
end

local function ids_under(deny_key)
  local packed = redis.call('HGET', tag .. ':y', deny_key) or ''
  local ids, at = {}, 1
  while at <= #packed do
    ids[#ids + 1], at = struct.unpack('>I2c0', packed, at)
  end
  return ids
end

local function put_ids(deny_key, ids)
  if #ids == 0 then
    redis.call('HDEL', tag .. ':y', deny_key)
    return
  end
  local packed = {}
  for i, id in ipairs(ids) do
    packed[i] = pack_item(id)
  end
  redis.call('HSET', tag .. ':y', deny_key, table.concat(packed))
end

local function remove_revocation(id)
  local packed = redis.call('HGET', tag .. ':v', id)
  if packed then
    local _, deny_key = unpack_revocation(packed)
    local left = {}
    for _, other in ipairs(ids_under(deny_key)) do
      if other ~= id then
        left[#left + 1] = other
      end
    end
    put_ids(deny_key, left)
  end
  redis.call('HDEL', tag .. ':v', id)
  redis.call('ZREM', tag .. ':p', id)
  redis.call('ZREM', tag .. ':x', id)
end
