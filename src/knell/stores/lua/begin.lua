-- Asks to run a batch. ARGV: now, lifetime of the record (s), record, holder, lease (s). Answers granted, done,
-- parked, abandoned.
local now = clock(ARGV[1])
local key = tag .. ':k:' .. ARGV[3]
local found = redis.call('HMGET', key, 'h', 'u', 'd', 'p')
local holder, until_ = found[1] or '', tonumber(found[2] or '0')
local others = holder ~= '' and holder ~= ARGV[4]
local granted = not others or until_ <= now
if granted then
  redis.call('HSET', key, 'h', ARGV[4], 'u', text(now + tonumber(ARGV[5])))
  keep(key, now, tonumber(ARGV[2]))
end
return {granted and 1 or 0, found[3] or '', found[4] or '', (others and granted and until_ > 0) and holder or ''}
