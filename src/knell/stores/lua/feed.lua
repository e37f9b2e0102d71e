-- The denylist and its change feed.
--   :m  epoch, pos and last (position and revocation id of the last change)    :f  the feed, ids "<position>-0"
--   :v  revocation id -> position, its deny key, the revocation    :p  ids by position    :x  ids by when they leave
--   :y:<deny key>  the ids under it, by strength
--   :cn  an issuer and names of claims -> how many revocations are by these    :m names  another mark when one is added
--   :s  service -> when it was added    :ms  service -> its missed record
local PAGE = 100
-- How many keys one command takes: Lua's stack is bounded.
local MOST_KEYS = 1000

local function pack_revocation(position, deny_key, revocation)
  return struct.pack('>I8', position) .. pack_item(deny_key) .. revocation
end

local function unpack_revocation(packed)
  local position, deny_key, at = struct.unpack('>I8I2c0', packed)
  return position, deny_key, string.sub(packed, at)
end

-- `feed` is the tag of the feed's slot, which need not be the script's own.
local function denied_by(feed, deny_key)
  return feed .. ':y:' .. deny_key
end

-- The strongest revocation of a key that has not expired; the others are not read.
local function strongest(feed, key, now)
  local from = 0
  while true do
    local ids = redis.call('ZREVRANGE', key, from, from + PAGE - 1)
    for _, id in ipairs(ids) do
      if tonumber(redis.call('ZSCORE', feed .. ':x', id)) > now then
        local _, _, revocation = unpack_revocation(redis.call('HGET', feed .. ':v', id))
        return revocation
      end
    end
    if #ids < PAGE then
      return nil
    end
    from = from + PAGE
  end
end

-- What is denied under some deny keys: {number of the key, revocation} for each that is.
local function look(feed, deny_keys, now)
  local keys, hits = {}, {}
  for i, deny_key in ipairs(deny_keys) do
    keys[i] = denied_by(feed, deny_key)
  end
  for from = 1, #keys, MOST_KEYS do
    local to = math.min(from + MOST_KEYS - 1, #keys)
    if redis.call('EXISTS', unpack(keys, from, to)) > 0 then
      for i = from, to do
        local found = strongest(feed, keys[i], now)
        if found then
          hits[#hits + 1] = {i - 1, found}
        end
      end
    end
  end
  return hits
end

-- The deny key of a revocation by claims is "cs", the issuer and the names, and a digest of 16 bytes.
local function count_names(deny_key, amount, mark)
  if string.sub(deny_key, 1, 2) ~= 'cs' then
    return
  end
  local field = string.sub(deny_key, 3, -17)
  local count = redis.call('HINCRBY', tag .. ':cn', field, amount)
  if count <= 0 then
    redis.call('HDEL', tag .. ':cn', field)
  elseif count == amount then
    redis.call('HSET', tag .. ':m', 'names', mark)
  end
end

-- {mark, names} if names were added since the caller learned of those of the mark `known`.
local function news_of_names(feed, known)
  local mark = redis.call('HGET', feed .. ':m', 'names') or ''
  return mark ~= known and {mark, redis.call('HKEYS', feed .. ':cn')} or nil
end

local function remove_revocation(id)
  local packed = redis.call('HGET', tag .. ':v', id)
  if packed then
    local _, deny_key = unpack_revocation(packed)
    redis.call('ZREM', denied_by(tag, deny_key), id)
    count_names(deny_key, -1)
  end
  redis.call('HDEL', tag .. ':v', id)
  redis.call('ZREM', tag .. ':p', id)
  redis.call('ZREM', tag .. ':x', id)
end
