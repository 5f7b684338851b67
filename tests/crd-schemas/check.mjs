// Reads a JSON list of custom resources from standard input; writes a JSON list with an error text, or null, for each.
import { readFileSync } from "node:fs";

const packages = {
  "monitoring.coreos.com": "prometheus-operator",
  "keda.sh": "keda",
  "gateway.networking.k8s.io": "gateway-api",
};

async function problem(object) {
  const [group, version] = object.apiVersion.split("/");
  if (!(group in packages)) return `no schema for ${object.apiVersion}`;
  const path = `@kubernetes-models/${packages[group]}/${group}/${version}/${object.kind}`;
  try {
    const model = (await import(path))[object.kind];
    new model(object).validate();
    return null;
  } catch (error) {
    return String(error.message);
  }
}

const objects = JSON.parse(readFileSync(0, "utf8"));
const problems = [];
for (const object of objects) problems.push(await problem(object));
process.stdout.write(JSON.stringify(problems));
