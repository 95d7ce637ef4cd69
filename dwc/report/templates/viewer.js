"use strict";
// Show a scan, its classes and its uncertainty with NiiVue, from the volumes that the page holds.
(async () => {
  const element = (name) => document.getElementById(name);
  const where = element("where");
  const data = JSON.parse(element("volumes").textContent);
  const canvas = element("canvas");
  if (!canvas.getContext("webgl2")) {
    where.textContent = "This browser has no WebGL 2, which the viewer needs; the pictures below do not.";
    return;
  }
  const { Niivue, NVImage, MULTIPLANAR_TYPE, SLICE_TYPE } = niivue;
  const viewer = new Niivue({
    backColor: [0, 0, 0, 1], crosshairColor: [1, 1, 1, 0.5], crosshairWidth: 0.6, isRadiologicalConvention: true,
    sagittalNoseLeft: false, show3Dcrosshair: true, isColorbar: false, loadingText: "", dragAndDropEnabled: false,
    multiplanarShowRender: 1, multiplanarLayout: MULTIPLANAR_TYPE.GRID, multiplanarPadPixels: 6, fontSizeScaling: 0.4, logLevel: "error",
  });
  const layers = { image: -1, classes: -1, uncertainty: -1 };

  function named(position) {
    const label = data.labels.labels[position];
    return position && label ? label : "background";
  }

  viewer.onLocationChange = (location) => {
    const values = location.values.map((value) => value.value);
    const [x, y, z] = location.mm;
    let text = `${named(Math.round(values[layers.classes]))}; x ${x.toFixed(0)}, y ${y.toFixed(0)}, z ${z.toFixed(0)} mm`;
    if (layers.uncertainty > 0) text += `; ${data.map} ${values[layers.uncertainty].toFixed(2)}`;
    where.textContent = text;
  };

  await viewer.attachToCanvas(canvas, false);
  for (const { kind, base64, most } of data.volumes) {
    const options = { base64, name: `${kind}.nii.gz`, colormap: "gray" };
    if (kind === "image") Object.assign(options, { cal_min: 0, cal_max: 252 });
    if (kind === "classes") options.opacity = Number(element("classes").value);
    if (kind === "uncertainty") Object.assign(options, { colormap: "inferno", opacity: 0, cal_min: most / 2, cal_max: most });
    const volume = await NVImage.loadFromBase64(options);
    if (kind === "classes") volume.setColormapLabel(data.labels);
    if (kind === "uncertainty") volume.colormapType = 2; // from 0 on, translucent below cal_min
    layers[kind] = viewer.volumes.length;
    viewer.addVolume(volume);
  }
  viewer.setInterpolation(false);

  element("classes").addEventListener("input", (event) => viewer.setOpacity(layers.classes, Number(event.target.value)));
  element("outlines").addEventListener("change", (event) => viewer.setAtlasOutline(event.target.checked ? 1 : 0));
  if (layers.uncertainty > 0)
    element("uncertainty").addEventListener("input", (event) => viewer.setOpacity(layers.uncertainty, Number(event.target.value)));
  const views = { all: SLICE_TYPE.MULTIPLANAR, axial: SLICE_TYPE.AXIAL, coronal: SLICE_TYPE.CORONAL, sagittal: SLICE_TYPE.SAGITTAL };
  element("view").addEventListener("change", (event) => viewer.setSliceType(views[event.target.value]));
  viewer.setSliceType(SLICE_TYPE.MULTIPLANAR);

  const keys = { ArrowLeft: [1, 0, 0], ArrowRight: [-1, 0, 0], ArrowUp: [0, 1, 0], ArrowDown: [0, -1, 0], PageUp: [0, 0, 1], PageDown: [0, 0, -1] };
  canvas.addEventListener("keydown", (event) => {
    if (!(event.key in keys)) return;
    event.preventDefault();
    event.stopImmediatePropagation();
    viewer.moveCrosshairInVox(...keys[event.key]);
  }, { capture: true });
  for (const button of document.querySelectorAll("button[data-place]"))
    button.addEventListener("click", () => {
      viewer.scene.crosshairPos = viewer.mm2frac(button.dataset.place.split(" ").map(Number));
      viewer.createOnLocationChange();
      viewer.drawScene();
      canvas.scrollIntoView({ block: "nearest" });
    });
  viewer.createOnLocationChange();
})();
