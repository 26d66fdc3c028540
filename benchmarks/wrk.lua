-- Every request a new history: wrk … URL -- ITEMS HEAD TAIL COUNT SEED PAUSE
-- ITEMS is a file with what a prompt says for an item, one a line; HEAD and TAIL are the JSON around the prompt.
-- In front of every request a client pauses for PAUSE ms in the mean, exponentially distributed; 0 for no pause.

local threads = 0

function setup(thread)
   thread:set("number", threads)
   threads = threads + 1
end

function init(args)
   items, head, tail, count = {}, args[2], args[3], tonumber(args[4])
   for line in io.lines(args[1]) do items[#items + 1] = line end
   math.randomseed(tonumber(args[5]) * 1000 + number)
   local pause = tonumber(args[6])
   if pause > 0 then
      function delay() return math.floor(0.5 - pause * math.log(1 - math.random())) end
   end
   wrk.method = "POST"
   wrk.headers["Content-Type"] = "application/json"
end

function request()
   local parts = {head}
   for i = 1, count do parts[i + 1] = items[math.random(#items)] end
   parts[count + 2] = tail
   return wrk.format(nil, nil, nil, table.concat(parts))
end

function done(summary, latency)
   local e = summary.errors
   io.write(string.format(
      'RESULT {"requests": %d, "seconds": %.6f, "errors": %d, "p50": %.0f, "p90": %.0f, "p99": %.0f}\n',
      summary.requests, summary.duration / 1e6, e.connect + e.read + e.write + e.status + e.timeout,
      latency:percentile(50), latency:percentile(90), latency:percentile(99)))
end
