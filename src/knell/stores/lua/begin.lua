-- Asks to run a batch. ARGV: now, lifetime of the record (s), service, batch, holder, lease (s). Answers granted, done,
-- parked, abandoned.
-- A store that keeps nothing but these records is pruned by nobody else.
local PRUNED_AT_ONCE = 3
local now, service, batch, holder = clock(ARGV[1]), ARGV[3], ARGV[4], ARGV[5]
local key = record_of(service, batch)
local found = redis.call('HMGET', key, 'h', 'u', 'd', 'p')
local held_by, until_ = found[1] or '', tonumber(found[2] or '0')
local others = held_by ~= '' and held_by ~= holder
local granted = not others or until_ <= now
if granted then
  redis.call('HSET', key, 'h', holder, 'u', text(now + tonumber(ARGV[6])))
  keep(service, batch, now, tonumber(ARGV[2]))
end
remove_old(service, now, PRUNED_AT_ONCE)
return {granted and 1 or 0, found[3] or '', found[4] or '', (others and granted and until_ > 0) and held_by or ''}
