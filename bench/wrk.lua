-- wrk's side: the request comes from the environment, the result goes to the last line as JSON (microseconds, bytes).
wrk.method, wrk.body = "POST", os.getenv("BENCH_BODY")
wrk.headers["Content-Type"] = "application/json"
wrk.headers["Authorization"] = "Bearer " .. os.getenv("BENCH_KEY")

function done(summary, latency)
  local e = summary.errors
  io.write(string.format('{"requests":%d,"bytes":%d,"us":%d,"p50_us":%d,"failed":[%d,%d,%d,%d,%d]}\n', summary.requests,
    summary.bytes, summary.duration, latency:percentile(50), e.connect, e.read, e.write, e.status, e.timeout))
end
