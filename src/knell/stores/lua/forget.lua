-- Ends a removed service's part in open records. ARGV: service, rank of the first record, how many to look at.
-- Answers how many were looked at, and how many of these are open still.
local service = ARGV[1]
local last = tonumber(ARGV[2]) + tonumber(ARGV[3]) - 1
local batches = redis.call('ZRANGE', tag .. ':o', ARGV[2], last)
local kept = 0
for _, batch in ipairs(batches) do
  local key = record_key(batch)
  if redis.call('HEXISTS', key, 'w:' .. service) == 1 then
    redis.call('HDEL', key, 's:' .. service)
    close_part(batch, redis.call('HGET', key, 'k'), service)
  end
  if redis.call('ZSCORE', tag .. ':o', batch) then
    kept = kept + 1
  end
end
return {#batches, kept}
