-- Records a revocation. ARGV: now, an epoch for an empty store, id, the revocation, when it leaves, deny key, batch id,
-- JWS, seconds to the first re-send. Answers epoch, position, created, then the services that its notice waits for.
local id, deny_key, batch = ARGV[3], ARGV[6], ARGV[7]
redis.call('HSETNX', tag .. ':m', 'epoch', ARGV[2])
local epoch = redis.call('HGET', tag .. ':m', 'epoch')

local position = redis.call('HGET', record_key(batch), 'p')
local entry = not position and redis.call('HGET', tag .. ':v', id)
if entry then
  position = struct.unpack('>I8', entry)
end
if position then
  local answer = {epoch, tonumber(position), 0}
  for _, name in ipairs(redis.call('HKEYS', record_key(batch))) do
    if string.sub(name, 1, 2) == 's:' then
      answer[#answer + 1] = string.sub(name, 3)
    end
  end
  return answer
end

local now = clock(ARGV[1])
local services = redis.call('HKEYS', tag .. ':s')
position = redis.call('HINCRBY', tag .. ':m', 'pos', 1)
redis.call('HSET', tag .. ':v', id, pack_revocation(position, deny_key, ARGV[4]))
redis.call('ZADD', tag .. ':p', position, id)
redis.call('ZADD', tag .. ':x', ARGV[5], id)
local ids = ids_under(deny_key)
ids[#ids + 1] = id
put_ids(deny_key, ids)
redis.call('XADD', tag .. ':f', string.format('%d-0', position), 'k', 'revoked', 'd', ARGV[4])
record(batch, 'r', now, ARGV[8], '\1', services, now + tonumber(ARGV[9]))
redis.call('HSET', record_key(batch), 'p', position)
return {epoch, position, 1, unpack(services)}
