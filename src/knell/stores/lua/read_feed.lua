-- The epoch, the head, its revocation, and the entries from a position on. ARGV: the position, how many ("" for none).
-- A script, because a server that is out of memory refuses a transaction even if it only reads.
local head = redis.call('HMGET', tag .. ':m', 'epoch', 'pos', 'last')
local entries = {}
if ARGV[1] ~= '' then
  entries = redis.call('XRANGE', tag .. ':f', string.format('%d-0', ARGV[1]), '+', 'COUNT', ARGV[2])
end
return {head[1], head[2], head[3], entries}
