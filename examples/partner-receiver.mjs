// A partner's receiving end, in plain Node (18 or newer), with no dependencies.
//
//   PARTNER_WEBHOOK_SECRET=whsec_... PORT=8080 node examples/partner-receiver.mjs
//
// It checks each POST as the Standard Webhooks specification says, ends the sessions that it names, and writes one JSON
// line for each. Replace `endSessions` and `seen` by your own; the rest can stay as it is.

import { createHmac, timingSafeEqual } from "node:crypto";
import { createServer } from "node:http";

const TOLERANCE_SECONDS = 300; // an older copy, or one from the future, is not believed
const MAX_BODY_BYTES = 1024 * 1024;

const secret = process.env.PARTNER_WEBHOOK_SECRET ?? "";
const key = Buffer.from(secret.replace(/^whsec_/, ""), "base64");
if (!secret.startsWith("whsec_") || key.length < 24) {
  console.error("PARTNER_WEBHOOK_SECRET must be whsec_ and at least 24 bytes in base64");
  process.exit(2);
}

// The ids that were handled: the sender tells everything at least once. Keep them in your database, for seven days, and
// write them in the transaction that ends the sessions.
const seen = new Set();

function endSessions({ type, timestamp, data }) {
  console.log(JSON.stringify({ event: "received", type, timestamp, data, at: Date.now() / 1000 }));
}

function verified(headers, body) {
  const id = headers["webhook-id"];
  const timestamp = headers["webhook-timestamp"];
  const signatures = headers["webhook-signature"];
  if (!id || !/^\d+$/.test(timestamp ?? "") || !signatures) return false;
  if (Math.abs(Date.now() / 1000 - Number(timestamp)) > TOLERANCE_SECONDS) return false;
  const expected = createHmac("sha256", key).update(`${id}.${timestamp}.`).update(body).digest();
  return signatures.split(" ").some((signature) => {
    const [version, value] = signature.split(",");
    const given = Buffer.from(value ?? "", "base64");
    return version === "v1" && given.length === expected.length && timingSafeEqual(given, expected);
  });
}

async function read(request) {
  const chunks = [];
  let size = 0;
  for await (const chunk of request) {
    size += chunk.length;
    if (size > MAX_BODY_BYTES) return null;
    chunks.push(chunk);
  }
  return Buffer.concat(chunks);
}

async function answer(request) {
  if (request.method !== "POST") return 405;
  const body = await read(request);
  if (body === null) return 413;
  if (!verified(request.headers, body)) return 401;
  const id = request.headers["webhook-id"];
  if (!seen.has(id)) {
    endSessions(JSON.parse(body)); // an error here is answered with 500, and the sender tries again
    seen.add(id);
  }
  return 204;
}

const server = createServer((request, response) => {
  answer(request).then(
    (status) => response.writeHead(status, status === 413 ? { connection: "close" } : {}).end(),
    (error) => {
      console.error(error);
      response.writeHead(500).end();
    },
  );
});

server.listen(Number(process.env.PORT ?? 8080), "127.0.0.1", () => {
  console.log(JSON.stringify({ event: "listening", port: server.address().port }));
});
