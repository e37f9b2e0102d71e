-- Gives an empty store its epoch. ARGV: a random one.
redis.call('HSETNX', tag .. ':m', 'epoch', ARGV[1])
return redis.call('HGET', tag .. ':m', 'epoch')
