// Swagger UI over openapi.json, with requests below the prefix that a proxy may add.

const base = new URL("..", import.meta.url);
const spec = await (await fetch(new URL("openapi.json", base))).json();
globalThis.SwaggerUIBundle({ spec: { ...spec, servers: [{ url: base.href }] }, dom_id: "#swagger-ui" });
