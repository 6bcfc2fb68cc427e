// The image to start from, with a mask painted over it. White in the mask is painted anew.

import { dataOf } from "./gallery.js";

const COLOUR = "rgb(220 40 40)";

export class MaskedImage {
  constructor(canvas) {
    this.canvas = canvas;
    this.mask = document.createElement("canvas");
    this.image = null;
    this.data = null;
    this.brush = 16;
    this.erases = false;
    this.isMasked = false;
    this.last = null;
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      this.last = this.place(event);
      this.paint(this.last);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (this.last) this.paint(this.place(event));
    });
    for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => (this.last = null));
  }

  async open(blob) {
    const bitmap = await createImageBitmap(blob);
    this.image = bitmap;
    this.data = await dataOf(blob);
    for (const one of [this.canvas, this.mask]) {
      one.width = bitmap.width;
      one.height = bitmap.height;
    }
    this.clear();
  }

  remove() {
    this.image = this.data = null;
    this.isMasked = false;
  }

  place(event) {
    const box = this.canvas.getBoundingClientRect();
    const scale = this.canvas.width / box.width;
    return { x: (event.clientX - box.left) * scale, y: (event.clientY - box.top) * scale };
  }

  paint(to) {
    const context = this.mask.getContext("2d");
    const from = this.last || to;
    context.globalCompositeOperation = this.erases ? "destination-out" : "source-over";
    context.strokeStyle = "white";
    context.lineCap = context.lineJoin = "round";
    context.lineWidth = (this.brush / 100) * Math.max(this.mask.width, this.mask.height);
    context.beginPath();
    context.moveTo(from.x, from.y);
    context.lineTo(to.x + 0.01, to.y);
    context.stroke();
    this.last = to;
    this.isMasked = true;
    this.show();
  }

  clear() {
    this.mask.getContext("2d").clearRect(0, 0, this.mask.width, this.mask.height);
    this.isMasked = false;
    this.show();
  }

  fill() {
    const context = this.mask.getContext("2d");
    context.globalCompositeOperation = "source-over";
    context.fillStyle = "white";
    context.fillRect(0, 0, this.mask.width, this.mask.height);
    this.isMasked = true;
    this.show();
  }

  show() {
    const context = this.canvas.getContext("2d");
    const tint = document.createElement("canvas");
    tint.width = this.mask.width;
    tint.height = this.mask.height;
    const own = tint.getContext("2d");
    own.drawImage(this.mask, 0, 0);
    own.globalCompositeOperation = "source-in";
    own.fillStyle = COLOUR;
    own.fillRect(0, 0, tint.width, tint.height);
    context.clearRect(0, 0, this.canvas.width, this.canvas.height);
    context.drawImage(this.image, 0, 0);
    context.globalAlpha = 0.55;
    context.drawImage(tint, 0, 0);
    context.globalAlpha = 1;
  }

  // Black and white, without transparency, as the server reads masks.
  maskData() {
    const flat = document.createElement("canvas");
    flat.width = this.mask.width;
    flat.height = this.mask.height;
    const context = flat.getContext("2d");
    context.fillStyle = "black";
    context.fillRect(0, 0, flat.width, flat.height);
    context.drawImage(this.mask, 0, 0);
    return flat.toDataURL("image/png");
  }
}
