-- Seconds up to ARGV[1] that have members, oldest first, at most ARGV[2]. A block has at least one.
local before, limit = tonumber(ARGV[1]), tonumber(ARGV[2])
local found = {}
local blocks = redis.call('ZRANGEBYSCORE', tag .. ':z', '-inf', math.floor(before / BLOCK), 'LIMIT', 0, limit)
for _, block in ipairs(blocks) do
  for _, name in ipairs(redis.call('HKEYS', tag .. ':x:' .. block)) do
    local second = tonumber(block) * BLOCK + tonumber(name)
    if second <= before then
      found[#found + 1] = second
    end
  end
  if #found >= limit then
    break
  end
end
table.sort(found)
for i = #found, limit + 1, -1 do
  found[i] = nil
end
return found
