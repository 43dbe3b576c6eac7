// node examples/predict.mjs PHOTO [URL]; from a web page, allow its origin: cliphar serve --cors https://page.example
import { readFile } from "node:fs/promises";

const [photo, url = "http://127.0.0.1:8000"] = process.argv.slice(2);
const form = new FormData();
form.append("images", new Blob([await readFile(photo)]), "photo.jpg");
form.append("labels", "taking a photo, sleeping");

const response = await fetch(`${url}/v1/predict`, { method: "POST", body: form });
const answer = await response.json();
if (!response.ok) throw new Error(`${answer.title}: ${answer.detail}`); // RFC 9457; on 503 and 429 see Retry-After
for (const { label, score, error } of answer.predictions) console.log(error ?? `${label} ${score}`);
