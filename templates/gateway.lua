-- Routes a request to a model's backend; holds it where the model is on its way, and asks
-- supervisord for a model that is wanted and does not run. Loaded by HAProxy.
--
-- What there is stands in two maps, which the event listener keeps up to date:
--   routes   a word that a request may name -> the program that shall answer
--   models   program -> what to do with a request for it:
--              serve [FALLBACK]   a server answers; FALLBACK: not the model itself
--              hold               it is on its way
--              avoid              its server may seem to be up, and answers nobody
--              demand             it comes when it is asked for
--              refuse REASON      it does not come by itself
--            =PROGRAM -> its object in /v1/models; *1, *2 ... -> the programs in their order
--            (a map's lines must be short)
-- Whether a server is up is HAProxy's own finding, so that a listener that is down costs nothing.
-- While somebody is held, the server is asked more often than HAProxy would, by one of those held.

local HOLD_SECONDS = tonumber(os.getenv("SYNAPSE_HOLD_SECONDS"))
local MOST_HELD = tonumber(os.getenv("SYNAPSE_MOST_HELD"))
local SUPERVISORD = os.getenv("SYNAPSE_SUPERVISORD")
local LOOK_MS = 50
local FIRST_LOOK_MS = 10 -- of the one who asks the server for all who wait for it
local PROBE_SECONDS = 1
local GONE_SECONDS = 0.2 -- who has not looked for so long asks no more
local REFUSAL_SECONDS = 0.5 -- so long a refusal must stand: a restart by hand is a stop and a start
local ASK_SECONDS = 1
local LONGEST_WORD = 300

local routes = Map.new(os.getenv("SYNAPSE_ROUTES"), Map._str)
local models = Map.new(os.getenv("SYNAPSE_MODELS"), Map._str)
local waiting = {} -- each caller that is held -> when it last looked; one that went away looks no more
local first = {} -- program -> the caller who asks its server
local asked = {} -- program -> when supervisord was last asked for it, so that callers share one

local function clock()
  local now = core.now()
  return now.sec + now.usec / 1e6
end

local function quoted(text)
  local safe = text:sub(1, LONGEST_WORD):gsub("[^%w%._:/@+,; -]", "?")
  return '"' .. safe .. '"'
end

local function names()
  local found = {}
  local name = models:lookup("*1")
  while name do
    found[#found + 1] = name
    name = models:lookup("*" .. #found + 1)
  end
  return found
end

local function error_text(kind, code, message, more)
  return '{"error":{"message":' .. quoted(message) .. ',"type":"' .. kind .. '","param":"model","code":"'
    .. code .. '"' .. (more or "") .. "}}\n"
end

local function names_text()
  local found = names()
  return ',"models":[' .. (#found > 0 and '"' .. table.concat(found, '","') .. '"' or "") .. "]"
end

local function fail(txn, status, kind, code, message, more)
  local reply = txn:reply({status = status})
  reply:add_header("content-type", "application/json")
  reply:add_header("cache-control", "no-store")
  if status == 503 then
    reply:add_header("retry-after", "5")
  end
  reply:set_body(error_text(kind, code, message, more))
  txn:done(reply)
end

local function server_of(program)
  local backend = core.backends[program]
  return backend and backend.servers["model"]
end

-- What has given up answering is taken out at once, though its /health may still say 200.
local function is_avoided(program)
  return models:lookup(program) == "avoid"
end

local function is_up(program)
  local server = server_of(program)
  if not server or is_avoided(program) then
    return false
  end
  local stats = server:get_stats()
  -- Before the first look HAProxy calls a server UP; while it looks, "* " stands before what the
  -- last one found.
  local found = (stats["check_status"] or "INI"):gsub("^%* ", "")
  return (stats["status"] or ""):sub(1, 2) == "UP" and found ~= "INI"
end

-- Whether a caller is the one who asks the server; another takes over when that one has gone, or
-- waits for an answer that does not come.
local function is_first(program, caller)
  local other = first[program]
  local looked_at = other and waiting[other]
  if other ~= caller and looked_at and clock() - looked_at <= GONE_SECONDS then
    return false
  end
  first[program] = caller
  return true
end

local function answers(server)
  local socket = core.tcp()
  socket:settimeout(PROBE_SECONDS)
  local line
  if socket:connect(server:get_addr()) then
    socket:send("GET /health HTTP/1.0\r\nHost: localhost\r\n\r\n")
    line = socket:receive("*l")
  end
  socket:close()
  return line ~= nil and line:match("^HTTP/1%.%d 200") ~= nil
end

-- Sooner than HAProxy's next look: whether a server that is not drained answers by now.
local function has_come_up(program)
  local server = server_of(program)
  local is_draining = server and (server:get_stats()["status"] or ""):match("^%u+") == "DRAIN"
  if not server or is_draining or is_avoided(program) then
    return false
  end
  if not answers(server) then
    return false
  end
  server:check_force_up()
  return (server:get_stats()["status"] or ""):sub(1, 2) == "UP"
end

local function ask_for(program)
  local now = core.now().sec
  if asked[program] and now - asked[program] < ASK_SECONDS then
    return
  end
  asked[program] = now
  local socket = core.tcp()
  socket:settimeout(2)
  if not socket:connect("unix@" .. SUPERVISORD) then
    return
  end
  local body = "<?xml version='1.0'?><methodCall><methodName>synapse.demand</methodName><params>"
    .. "<param><value><string>" .. program .. "</string></value></param></params></methodCall>"
  socket:send("POST /RPC2 HTTP/1.0\r\nContent-Type: text/xml\r\nContent-Length: " .. #body
    .. "\r\n\r\n" .. body)
  socket:receive("*l")
  socket:close()
end

local function resolve(word)
  local program = routes:lookup(word) or routes:lookup(word:lower())
  return program and core.backends[program] and program
end

-- Until a server is up that may answer: the program, or nil and why none does. What a word means
-- may change meanwhile. HAProxy ends this when the caller goes away, and nobody asks any more.
local function hold(word, caller)
  local deadline = core.now().sec + HOLD_SECONDS
  local refused_at
  while core.now().sec < deadline do
    waiting[caller] = clock()
    local program = resolve(word)
    if not program then
      return nil, "it is there no more"
    end
    local asks = is_first(program, caller)
    if is_up(program) or (asks and has_come_up(program)) then
      return program
    end
    local verdict, reason = (models:lookup(program) or "hold"):match("^(%S+) ?(.*)$")
    refused_at = verdict == "refuse" and (refused_at or clock()) or nil
    if refused_at and clock() - refused_at >= REFUSAL_SECONDS then
      return nil, reason
    elseif verdict == "demand" then
      ask_for(program)
    end
    core.msleep(asks and FIRST_LOOK_MS or LOOK_MS)
  end
  return nil, "it was not ready within " .. HOLD_SECONDS .. " s"
end

local function count_waiting()
  local now, count = clock(), 0
  for caller, looked_at in pairs(waiting) do
    if now - looked_at > 2 then
      waiting[caller] = nil
    else
      count = count + 1
    end
  end
  return count
end

local function route(txn)
  local word = txn:get_var("txn.word")
  if type(word) == "boolean" or word == nil or word == "" then
    fail(txn, 400, "invalid_request_error", "model_missing",
      "name a model: a JSON body with model, or a path that begins with /model/NAME/")
    return
  end
  word = tostring(word)
  local program = resolve(word)
  if not program then
    fail(txn, 404, "invalid_request_error", "model_not_found",
      "there is no model " .. word, names_text())
    return
  end
  if not is_up(program) then
    if count_waiting() >= MOST_HELD then
      fail(txn, 503, "overloaded_error", "model_not_ready", program .. ": too many wait already")
      return
    end
    local caller = {}
    local found, reason = hold(word, caller)
    waiting[caller] = nil
    if not found then
      fail(txn, 503, "overloaded_error", "model_not_ready", program .. ": " .. reason)
      return
    end
    program = found
  end
  txn:set_var("txn.program", program)
  local fallback = (models:lookup(program) or ""):match("^serve (%S+)$")
  if fallback then
    txn:set_var("txn.fallback", fallback)
  end
end

core.register_action("route", {"http-req"}, route)

local function answer(applet, status, body)
  applet:set_status(status)
  applet:add_header("content-type", "application/json")
  applet:add_header("content-length", tostring(#body))
  applet:start_response()
  applet:send(body)
end

core.register_service("models", "http", function(applet)
  local found = {}
  for _, name in ipairs(names()) do
    found[#found + 1] = models:lookup("=" .. name)
  end
  answer(applet, 200, '{"object":"list","data":[' .. table.concat(found, ",") .. "]}")
end)

core.register_service("model", "http", function(applet)
  local word = applet.path:match("^.-/models/(.*)$"):gsub("%%(%x%x)", function(digits)
    return string.char(tonumber(digits, 16))
  end)
  local program = resolve(word)
  local found = program and models:lookup("=" .. program)
  if found then
    answer(applet, 200, found)
  else
    answer(applet, 404, error_text("invalid_request_error", "model_not_found",
      "there is no model " .. word, names_text()))
  end
end)
