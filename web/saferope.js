/* Lists say what people read, and inputs for experts are folded; values stay as the API has them.

Asks the server for its translations alone. Sends nothing, keeps nothing, and touches no node but SafeRoPE's. */

import { api } from "../../scripts/api.js"
import { app } from "../../scripts/app.js"

const OURS = "SafeRoPE_"
let translations = {}

const setting = name => app.extensionManager.setting.get(name)
const own = (table, key) => (table && Object.hasOwn(table, key) ? table[key] : undefined)

/** A value in the person's language; a concept file as "star · tiny world", the model that it is made for. */
function label(kind, input, madeFor, value) {
  const inputs = own(translations, setting("Comfy.Locale"))?.nodeDefs?.[kind]?.inputs
  const said = text => own(own(inputs, input)?.options, text) ?? text
  const model = own(madeFor, value)
  return model ? `${value.replace(/\.safetensors$/, "")} · ${said(model)}` : said(value)
}

/** Nodes 2.0 folds by itself. The classic renderer asks for `advanced` and `hidden`, which ComfyUI's page leaves unset. */
function fold(node, widget) {
  const linked = () => node.inputs?.find(input => input.widget?.name === widget.name)?.link != null
  const advanced = () => !linked() && !setting("Comfy.Node.AlwaysShowAdvancedWidgets")
  const hidden = () => advanced() && !node.showAdvanced && !setting("Comfy.VueNodes.Enabled")
  Object.defineProperty(widget, "advanced", { configurable: true, get: advanced, set() {} })
  Object.defineProperty(widget, "hidden", { configurable: true, get: hidden, set() {} })
}

app.registerExtension({
  name: "SafeRoPE",
  async init() {
    translations = await (await api.fetchApi("/i18n")).json().catch(() => ({}))
  },
  nodeCreated(node) {
    const kind = node.comfyClass ?? ""
    if (!kind.startsWith(OURS)) return
    const { required, optional } = node.constructor.nodeData.input
    const unfolded = node.computeSize()[1]
    for (const widget of node.widgets ?? []) {
      const options = own({ ...required, ...optional }, widget.name)?.[1]
      if (widget.type === "combo" && options)
        widget.options.getOptionLabel = value => label(kind, widget.name, options.made_for, value ?? "")
      if (widget.options?.advanced) fold(node, widget)
    }
    node.setSize([node.size[0], node.size[1] - unfolded + node.computeSize()[1]])
  },
})
