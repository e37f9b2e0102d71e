-- Removes records. ARGV: batch ids. Answers how many there were.
local removed = 0
for i = 1, #ARGV do
  removed = removed + remove_record(ARGV[i])
end
return removed
