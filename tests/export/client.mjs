// transformers.js on a folder from disk: what it makes of the given texts and pictures, as JSON.
import { AutoProcessor, AutoTokenizer, CLIPTextModelWithProjection, CLIPVisionModelWithProjection, RawImage,
  SiglipTextModel, SiglipVisionModel, env } from '@huggingface/transformers';
import fs from 'node:fs';

const [folder, asked] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = '/';
const { texts, pictures, dtypes } = JSON.parse(fs.readFileSync(asked));
const siglip = JSON.parse(fs.readFileSync(`${folder}/config.json`)).model_type === 'siglip';
const tokenizer = await AutoTokenizer.from_pretrained(folder);
const processor = await AutoProcessor.from_pretrained(folder);
const rows = (tensor) => tensor.tolist().map((row) => row.map(Number));
const answer = { ids: texts.map((text) => tokenizer(text, { return_tensor: false }).input_ids.map(Number)) };
for (const dtype of dtypes) {
  const options = dtype === 'default' ? {} : { dtype };
  const text = await (siglip ? SiglipTextModel : CLIPTextModelWithProjection).from_pretrained(folder, options);
  const vision = await (siglip ? SiglipVisionModel : CLIPVisionModelWithProjection).from_pretrained(folder, options);
  const inputs = tokenizer(texts, { padding: siglip ? 'max_length' : true, truncation: true });
  const images = await processor(await Promise.all(pictures.map((path) => RawImage.read(path))));
  answer[dtype] = {
    text: rows((await text(inputs)).text_embeds),
    image: rows((await vision({ pixel_values: images.pixel_values })).image_embeds),
  };
}
console.log(JSON.stringify(answer));
