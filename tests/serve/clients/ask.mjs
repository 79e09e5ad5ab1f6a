// What every client of Node is asked, as ask.py has it for Python.
// `node use_CLIENT.mjs WHAT URL MODEL`; CLIENTS_NODE names the folder with its node_modules.
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const require = createRequire(process.env.CLIENTS_NODE + "/package.json");
export const load = (name) => import(pathToFileURL(require.resolve(name)).href);

export const QUESTION = "How deep is the sea?";
export const WEATHER = "What is the weather in Oslo?";
export const PARAMETERS = {
  type: "object",
  properties: { city: { type: "string" } },
  required: ["city"],
};

export const weather = ({ city }) => {
  if (city !== "Oslo") throw new Error(`not Oslo but ${city}`);
  return "11 degrees";
};

export async function run(functions) {
  const [what, url, model] = process.argv.slice(2);
  console.log(JSON.stringify(await functions[what](url, model)));
}
