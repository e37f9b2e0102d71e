-- Notices for services were dropped. ARGV: now, then for each: service, since when, a batch id for a new record.
local now = clock(ARGV[1])
for i = 2, #ARGV, 3 do
  mark_missed(ARGV[i], ARGV[i + 1], ARGV[i + 2], now)
end
return 1
