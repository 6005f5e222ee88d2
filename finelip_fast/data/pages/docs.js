"use strict";
// validatorUrl: null, or Swagger UI would show what is served here to a validator on the internet.
SwaggerUIBundle({
  url: "/openapi.json",
  dom_id: "#swagger",
  deepLinking: true,
  validatorUrl: null,
  presets: [SwaggerUIBundle.presets.apis],
});
