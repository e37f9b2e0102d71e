-- Keeps what was given up on. ARGV: number of JWSs, digest and JWS of each, then for each entry: id, digest ("" for
-- none), service, when, JSON.
local jws = {}
local count = tonumber(ARGV[1])
for i = 2, 2 * count, 2 do
  jws[ARGV[i]] = ARGV[i + 1]
end
for i = 2 * count + 2, #ARGV, 5 do
  local id, digest, service, at, body = unpack(ARGV, i, i + 4)
  remove_parked(id)
  if digest ~= '' then
    redis.call('HSETNX', tag .. ':pj', digest, jws[digest])
    redis.call('HINCRBY', tag .. ':pc', digest, 1)
  end
  redis.call('HSET', tag .. ':pd', id, pack_item(digest) .. pack_item(service) .. struct.pack('>I4', #body) .. body)
  redis.call('ZADD', tag .. ':pk', 0, id)
  redis.call('ZADD', tag .. ':pk:' .. service, 0, id)
  redis.call('ZADD', tag .. ':pa', at, id)
end
return 1
