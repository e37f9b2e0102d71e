-- The timers of these seconds are confirmed. ARGV: the seconds.
for i = 1, #ARGV do
  local second = get_second(tonumber(ARGV[i]))
  if second.stored and not second.confirmed then
    second.confirmed, second.changed = true, true
  end
end
put_seconds()
return 1
