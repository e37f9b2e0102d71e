-- Open records whose time has come, by that time. ARGV: now, limit. Answers id, time, and so on.
local now = text(clock(ARGV[1]))
return redis.call('ZRANGEBYSCORE', tag .. ':o', '-inf', now, 'WITHSCORES', 'LIMIT', 0, ARGV[2])
