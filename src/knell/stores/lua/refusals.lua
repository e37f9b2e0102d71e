-- What the denylist says of some deny keys. ARGV: now, the mark of the names of claims that the keys were made with, the
-- keys. Answers {0, what is denied}, as `look` does, or {2, mark, names} if other names are to be looked for as well.
local now, known = clock(table.remove(ARGV, 1)), table.remove(ARGV, 1)
local news = news_of_names(tag, known)
if news then
  return {2, news[1], news[2]}
end
return {0, look(tag, ARGV, now)}
