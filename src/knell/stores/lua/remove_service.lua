-- Takes a service out of the registry. ARGV: name. A claim that began before may still wait for it: hence :gone.
local removed = redis.call('HDEL', tag .. ':s', ARGV[1])
if removed == 1 then
  redis.call('SADD', tag .. ':gone', ARGV[1])
end
return removed
