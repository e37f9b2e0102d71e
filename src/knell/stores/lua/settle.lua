-- Drops entries from an expiry record, once. ARGV: batch id, bitmap of the entries to drop.
local batch = ARGV[1]
local key = record_key(batch)
local found = redis.call('HMGET', key, 'k', 'l', 'b', 'y')
if found[1] ~= 'e' or redis.call('HSETNX', key, 'st', 1) == 0 then
  return 0
end
local live = without(found[2], ARGV[2])
if is_empty(live) then
  return remove_record(batch)
end
local at = 5 + struct.unpack('>I4', found[3])
local kept = {string.sub(found[3], 1, at - 1)}
while at <= #found[3] do
  local size, n = struct.unpack('>I2I2', found[3], at)
  local byte = string.byte(live, math.floor(n / 8) + 1)
  if bit.band(byte, 2 ^ (n % 8)) ~= 0 then
    kept[#kept + 1] = string.sub(found[3], at, at + 1 + size)
  end
  at = at + 2 + size
end
local body = table.concat(kept)
redis.call('HSET', key, 'l', live, 'b', body, 'y', #body + RECORD_OVERHEAD)
redis.call('INCRBY', tag .. ':b', #body + RECORD_OVERHEAD - tonumber(found[4]))
for _, service in ipairs(waiting(key)) do
  local closed = string.sub(redis.call('HGET', key, 'w:' .. service), 9)
  if is_empty(without(live, closed)) then
    close_part(batch, 'e', service)
  end
end
return 1
