-- What was given up on: :pd id -> digest of its JWS, service, the rest as JSON; :pj and :pc the JWS by digest and how
-- many refer to it (a whole batch is parked with one JWS); :pk and :pk:<service> the ids in order; :pa the ids by age.
local function unpack_parked(packed)
  return struct.unpack('>I2c0I2c0I4c0', packed)
end

local function remove_parked(id)
  local packed = redis.call('HGET', tag .. ':pd', id)
  if not packed then
    return 0
  end
  local digest, service = unpack_parked(packed)
  if digest ~= '' and redis.call('HINCRBY', tag .. ':pc', digest, -1) <= 0 then
    redis.call('HDEL', tag .. ':pc', digest)
    redis.call('HDEL', tag .. ':pj', digest)
  end
  redis.call('HDEL', tag .. ':pd', id)
  redis.call('ZREM', tag .. ':pk', id)
  redis.call('ZREM', tag .. ':pk:' .. service, id)
  redis.call('ZREM', tag .. ':pa', id)
  return 1
end
