-- Sets when open records are sent again. ARGV: when, batch ids.
for i = 2, #ARGV do
  redis.call('ZADD', tag .. ':o', 'XX', ARGV[1], ARGV[i])
end
return 1
