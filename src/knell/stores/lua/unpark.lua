-- Removes parked entries. ARGV: ids. Answers how many there were.
local removed = 0
for i = 1, #ARGV do
  removed = removed + remove_parked(ARGV[i])
end
return removed
