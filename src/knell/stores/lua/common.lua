-- Starts every script. KEYS[1] is the slot's tag, for example "{knell:1}"; every key begins with it.
local tag = KEYS[1]

-- `given` is "" for the server's own clock.
local function clock(given)
  if given ~= '' then
    return tonumber(given)
  end
  local now = redis.call('TIME')
  return tonumber(now[1]) + tonumber(now[2]) / 1000000
end

-- Doubles leave a script as text: a number would be cut to an integer.
local function text(number)
  return string.format('%.17g', number)
end

-- An item of at most 65,535 bytes, with its length before it.
local function pack_item(item)
  return struct.pack('>I2', #item) .. item
end

-- Bitmaps are byte strings: bit n is bit n % 8 of byte n / 8.
local function combine(one, other, with)
  local bytes = {}
  for i = 1, math.max(#one, #other) do
    bytes[i] = string.char(with(string.byte(one, i) or 0, string.byte(other, i) or 0))
  end
  return table.concat(bytes)
end

local function union(one, other)
  return combine(one, other, bit.bor)
end

local function without(one, other)
  return combine(one, other, function(a, b) return bit.band(a, 255 - b) end)
end

local function is_empty(bitmap)
  return not string.find(bitmap, '[^%z]')
end
