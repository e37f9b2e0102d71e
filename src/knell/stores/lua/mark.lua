-- Adds marks. ARGV: now, lifetime of the record (s), service, batch, holder, lease (s), bitmaps of done, parked and
-- unparked.
local now, lease = clock(ARGV[1]), tonumber(ARGV[6])
local key = record_of(ARGV[3], ARGV[4])
local found = redis.call('HMGET', key, 'h', 'd', 'p')
local parked = without(union(found[3] or '', ARGV[8]), ARGV[9])
redis.call('HSET', key, 'd', union(found[2] or '', ARGV[7]), 'p', parked)
local held = found[1] == ARGV[5]
if held and lease > 0 then
  redis.call('HSET', key, 'u', text(now + lease))
elseif held then
  redis.call('HSET', key, 'u', '0')
end
keep(ARGV[3], ARGV[4], now, tonumber(ARGV[2]))
return held and 1 or 0
