-- Registers a service. ARGV: now, name.
redis.call('SREM', tag .. ':gone', ARGV[2])
return redis.call('HSETNX', tag .. ':s', ARGV[2], text(clock(ARGV[1])))
