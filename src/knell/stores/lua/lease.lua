-- Takes, renews or gives back a named lease. ARGV: now, name, holder, seconds.
local now, seconds = clock(ARGV[1]), tonumber(ARGV[4])
local found = redis.call('HGET', tag .. ':le', ARGV[2])
if found and struct.unpack('>d', found) > now and string.sub(found, 9) ~= ARGV[3] then
  return 0
end
if seconds > 0 then
  redis.call('HSET', tag .. ':le', ARGV[2], struct.pack('>d', now + seconds) .. ARGV[3])
else
  redis.call('HDEL', tag .. ':le', ARGV[2])
end
return 1
