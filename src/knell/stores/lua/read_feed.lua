-- The epoch, the head, and the entries after a position. ARGV: the position, how many ("" and "" for none).
-- A script, because a server that is out of memory refuses a transaction even if it only reads.
local head = redis.call('HMGET', tag .. ':m', 'epoch', 'pos')
local entries = {}
if ARGV[1] ~= '' then
  entries = redis.call('XRANGE', tag .. ':f', string.format('%d-0', ARGV[1] + 1), '+', 'COUNT', ARGV[2])
end
return {head[1], head[2], entries}
