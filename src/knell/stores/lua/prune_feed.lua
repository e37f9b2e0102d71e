-- Removes what has left the denylist, and the feed beyond its length. ARGV: now, length of the feed, the most to remove.
local most = tonumber(ARGV[3])
local ids = redis.call('ZRANGEBYSCORE', tag .. ':x', '-inf', text(clock(ARGV[1])), 'LIMIT', 0, most)
for _, id in ipairs(ids) do
  remove_revocation(id)
end
local length = redis.call('XLEN', tag .. ':f')
local excess = math.min(length - tonumber(ARGV[2]), most)
local trimmed = 0
if excess > 0 then
  local first = tonumber(redis.call('HGET', tag .. ':m', 'pos')) - length + 1
  trimmed = redis.call('XTRIM', tag .. ':f', 'MINID', string.format('%d-0', first + excess))
end
return {#ids, trimmed}
