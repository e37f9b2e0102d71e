-- Records a revocation. ARGV: now, an epoch for an empty store, id, the revocation, when it leaves, its strength, deny key,
-- batch id, JWS, seconds to the first re-send, the batch id of its undo, audit entry: id, when, the entry.
-- Answers epoch, position, created (-1 if it was undone since), then the services of its notice.
local id, deny_key, batch = ARGV[3], ARGV[7], ARGV[8]
redis.call('HSETNX', tag .. ':m', 'epoch', ARGV[2])
local epoch = redis.call('HGET', tag .. ':m', 'epoch')

local position = redis.call('HGET', record_key(batch), 'p')
local entry = not position and redis.call('HGET', tag .. ':v', id)
if entry then
  position = struct.unpack('>I8', entry)
end
if position then
  local answer = {epoch, tonumber(position), -redis.call('EXISTS', record_key(ARGV[11]))}
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
redis.call('HSET', tag .. ':m', 'last', id)
redis.call('HSET', tag .. ':v', id, pack_revocation(position, deny_key, ARGV[4]))
redis.call('ZADD', tag .. ':p', position, id)
redis.call('ZADD', tag .. ':x', ARGV[5], id)
redis.call('ZADD', denied_by(tag, deny_key), ARGV[6], id)
count_names(deny_key, 1, ARGV[2])
redis.call('XADD', tag .. ':f', string.format('%d-0', position), 'k', 'revoked', 'd', ARGV[4])
record(batch, 'r', now, ARGV[9], '\1', services, now + tonumber(ARGV[10]))
redis.call('HSET', record_key(batch), 'p', position)
note(ARGV[12], ARGV[13], ARGV[14])
return {epoch, position, 1, unpack(services)}
