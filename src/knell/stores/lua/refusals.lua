-- What the denylist says of some deny keys. ARGV: now, the keys. Answers as `look` does.
local now = clock(table.remove(ARGV, 1))
return look(tag, ARGV, now)
