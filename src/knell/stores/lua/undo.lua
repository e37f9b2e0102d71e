-- Takes a revocation back. ARGV: now, id, its batch id, the undo's batch id, JWS, seconds to the first re-send, audit
-- entry: id, when, the entry; the beginning of batch ids for missed records. Answers nothing if it is not on the denylist, else epoch, position, created, the number of
-- services of the undo's notice, these, then those that had not closed the revocation's own notice.
local id, revoked, undone = ARGV[2], ARGV[3], ARGV[4]
local epoch = redis.call('HGET', tag .. ':m', 'epoch')

local function services_of(batch)
  local found = {}
  for _, name in ipairs(redis.call('HKEYS', record_key(batch))) do
    if string.sub(name, 1, 2) == 's:' then
      found[#found + 1] = string.sub(name, 3)
    end
  end
  return found
end

local packed = redis.call('HGET', tag .. ':v', id)
if not packed then
  local position = redis.call('HGET', record_key(undone), 'p')
  if not position then
    return false
  end
  local services = services_of(undone)
  return {epoch, tonumber(position), 0, #services, unpack(services)}
end

local now = clock(ARGV[1])
local _, _, revocation = unpack_revocation(packed)
remove_revocation(id)
local untold = waiting(record_key(revoked))
for i, service in ipairs(untold) do
  redis.call('HSET', record_key(revoked), 's:' .. service, 'undone ' .. text(now))
  redis.call('HDEL', record_key(revoked), 'w:' .. service)
  -- Ends that this revocation was to tell are told by nobody now.
  mark_missed(service, text(cjson.decode(revocation).made_at), ARGV[10] .. '.' .. i, now)
end
close_record(revoked)
local position = redis.call('HINCRBY', tag .. ':m', 'pos', 1)
redis.call('HSET', tag .. ':m', 'last', id)
redis.call('XADD', tag .. ':f', string.format('%d-0', position), 'k', 'undone', 'd', revocation)
local services = redis.call('HKEYS', tag .. ':s')
record(undone, 'r', now, ARGV[5], '\1', services, now + tonumber(ARGV[6]))
redis.call('HSET', record_key(undone), 'p', position)
note(ARGV[7], ARGV[8], ARGV[9])
local answer = {epoch, position, 1, #services, unpack(services)}
for _, service in ipairs(untold) do
  answer[#answer + 1] = service
end
return answer
