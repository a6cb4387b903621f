// One request a line of JSON on standard input, one answer a line on standard output; see tests/clients/adapters/javascript.py.
import { createReadStream, createWriteStream } from "node:fs";
import { createInterface } from "node:readline";
import { pipeline } from "node:stream/promises";
import {
  CopyObjectCommand, DeleteObjectCommand, GetObjectCommand, HeadObjectCommand, paginateListObjectsV2, PutObjectCommand, S3Client,
} from "@aws-sdk/client-s3";
import { Upload } from "@aws-sdk/lib-storage";
import { getSignedUrl } from "@aws-sdk/s3-request-presigner";

const [, , endpoint, region] = process.argv;
const client = new S3Client({ endpoint, region, forcePathStyle: true, maxAttempts: 1 });
const path = (key) => key.split("/").map(encodeURIComponent).join("/");

const verbs = {
  async put({ bucket, key, file, metadata }) {
    await client.send(new PutObjectCommand({ Bucket: bucket, Key: key, Body: createReadStream(file), Metadata: metadata }));
  },
  async upload({ bucket, key, file }) {
    const params = { Bucket: bucket, Key: key, Body: createReadStream(file) };
    await new Upload({ client, params, partSize: 16 << 20 }).done();
  },
  async get({ bucket, key, file, range }) {
    const answer = await client.send(new GetObjectCommand({ Bucket: bucket, Key: key, Range: range }));
    await pipeline(answer.Body, createWriteStream(file));
  },
  async keys({ bucket }) {
    const found = [];
    for await (const page of paginateListObjectsV2({ client }, { Bucket: bucket })) found.push(...page.Contents.map((item) => item.Key));
    return found;
  },
  async copy({ bucket, source, key }) {
    await client.send(new CopyObjectCommand({ Bucket: bucket, Key: key, CopySource: `${bucket}/${path(source)}` }));
  },
  async delete({ bucket, key }) {
    await client.send(new DeleteObjectCommand({ Bucket: bucket, Key: key }));
  },
  async presign({ bucket, key }) {
    return await getSignedUrl(client, new GetObjectCommand({ Bucket: bucket, Key: key }), { expiresIn: 3600 });
  },
  async metadata({ bucket, key }) {
    return (await client.send(new HeadObjectCommand({ Bucket: bucket, Key: key }))).Metadata;
  },
};

for await (const line of createInterface({ input: process.stdin })) {
  const request = JSON.parse(line);
  let answer;
  try {
    answer = { value: await verbs[request.verb](request) };
  } catch (error) {
    answer = { error: `${error}` };
  }
  process.stdout.write(JSON.stringify(answer) + "\n");
}
