-- Asks to run a batch. ARGV: now, lifetime of the record (s), record, holder, lease (s). Answers granted, done, parked.
local now = clock(ARGV[1])
local key = tag .. ':k:' .. ARGV[3]
local found = redis.call('HMGET', key, 'h', 'u', 'd', 'p')
local holder = found[1] or ''
local granted = holder == '' or holder == ARGV[4] or tonumber(found[2]) <= now
if granted then
  redis.call('HSET', key, 'h', ARGV[4], 'u', text(now + tonumber(ARGV[5])))
  keep(key, now, tonumber(ARGV[2]))
end
return {granted and 1 or 0, found[3] or '', found[4] or ''}
